"""The Kubernetes manifests: valid by the schema, and as safe as they say.

Covers: the strict schema of the newest Kubernetes that `kubernetes-validate` bundles, and the
guarantees of `k8s/spot-job.yaml`. Does not cover: an API server's own checks, or GKE.
"""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import parse_args

from launch.config import parse_config
from launch.exit_codes import COMPLETE, FENCED, INTERNAL, PERMANENT, START_AGAIN
from launch.supervise import Flags
from storage.commands import parse
from storage.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("k8s/**/*.yaml"), *ROOT.glob("k8s/**/*.yml")])
TEXT = (ROOT / "k8s" / "spot-job.yaml").read_text()
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(TEXT))

SECRET_NAME = re.compile(r"(?i)secret|password|passwd|key|credential|token")
SECRET_VALUE = re.compile(
    r"-----BEGIN|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.|gh[pousr]_\w{36}|hf_\w{30}|://[^/\s]+:[^/\s]+@"
)
GIBIBYTE = 1 << 30


def of_kind(kind: str) -> dict[str, Any]:
    """The one document of that kind."""
    (found,) = [document for document in DOCUMENTS if document["kind"] == kind]
    return found


JOB = of_kind("Job")
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def validate(document: dict[str, Any], *, strict: bool = True) -> None:
    """ValidationError when the schema refuses it; strictly, an unknown field is refused too."""
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=strict)


def outcome(code: int, *, disrupted: bool = False) -> str:
    """What the Job does about a pod that failed: the first rule that matches, else it counts."""
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        conditions = [c["type"] for c in rule.get("onPodConditions", [])]
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        assert codes["operator"] == "In"
        if (disrupted and "DisruptionTarget" in conditions) or code in codes["values"]:
            return str(rule["action"])
    return "Count"


def environment(value: Any) -> Iterator[dict[str, Any]]:
    """Every entry of every `env` and `envFrom` in a document."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("env", "envFrom"):
                yield from inner
            yield from environment(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from environment(inner)


def secrets(documents: list[dict[str, Any]]) -> list[str]:
    """What looks like a secret: a Secret, a reference to one, an entry's name, or any value."""
    found = [d["kind"] for d in documents if d["kind"] == "Secret"]
    for entry in environment(documents):
        if "name" not in entry or SECRET_NAME.search(entry["name"]) or "valueFrom" in entry:
            found.append(str(entry))
    return found + SECRET_VALUE.findall(yaml.safe_dump(documents, width=1000))


def size_bytes(quantity: str) -> int:
    """Bytes of a quantity in Mi or Gi."""
    number, unit = int(quantity[:-2]), quantity[-2:]
    return number * {"Mi": GIBIBYTE // 1024, "Gi": GIBIBYTE}[unit]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_manifest_is_valid(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        validate(document)


def misspelled(job: dict[str, Any]) -> None:
    job["spec"]["backoffLimt"] = job["spec"].pop("backoffLimit")


def of_another_type(job: dict[str, Any]) -> None:
    job["spec"]["backoffLimit"] = "six"


def without_a_template(job: dict[str, Any]) -> None:
    del job["spec"]["template"]


def without_an_operator(job: dict[str, Any]) -> None:
    del job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["operator"]


def indented_too_little(job: dict[str, Any]) -> None:
    job["restartPolicy"] = "Never"


@pytest.mark.parametrize(
    "spoil",
    [
        misspelled,
        of_another_type,
        without_a_template,
        without_an_operator,
        indented_too_little,
    ],
)
def test_a_broken_manifest_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    broken = copy.deepcopy(JOB)
    spoil(broken)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


def test_only_the_strict_schema_refuses_a_misspelled_field() -> None:
    broken = copy.deepcopy(JOB)
    misspelled(broken)
    validate(broken, strict=False)


def test_two_values_are_left_to_edit() -> None:
    without_comments = yaml.safe_dump_all(DOCUMENTS, width=1000)
    assert set(re.findall(r"YOUR-[A-Z]+", without_comments)) == {"YOUR-REGISTRY", "YOUR-BUCKET"}


def test_preemptions_never_count_and_permanent_failures_end_the_job() -> None:
    assert outcome(START_AGAIN) == "Ignore"
    assert outcome(FENCED) == "FailJob"
    assert outcome(PERMANENT) == "FailJob"
    assert outcome(INTERNAL) == outcome(1) == outcome(137) == "Count"
    codes = (1, 137, 143, INTERNAL, START_AGAIN, FENCED, PERMANENT)
    assert {outcome(code, disrupted=True) for code in codes} == {"Ignore"}
    assert outcome(COMPLETE) == "Count", "the API server refuses 0 in a rule"


def test_the_policy_is_one_that_kubernetes_takes() -> None:
    assert POD["restartPolicy"] == "Never"
    assert JOB["spec"]["podReplacementPolicy"] == "Failed"
    assert JOB["spec"]["backoffLimit"] >= 1
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == CONTAINER["name"]
            assert rule["onExitCodes"]["values"] == sorted(set(rule["onExitCodes"]["values"]))


def test_one_pod_at_a_time_with_a_grace() -> None:
    assert JOB["spec"]["parallelism"] == JOB["spec"]["completions"] == 1
    assert 15 <= POD["terminationGracePeriodSeconds"] <= 120


def test_it_runs_on_spot_gpus() -> None:
    assert POD["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-accelerator" in POD["nodeSelector"], "one model of GPU"
    tolerated = {toleration["key"] for toleration in POD["tolerations"]}
    assert tolerated == {"cloud.google.com/gke-spot", "nvidia.com/gpu"}
    torchrun = parse_args(supervised()[1])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(torchrun.nproc_per_node)


def test_resources_are_asked_for_and_limited() -> None:
    resources = CONTAINER["resources"]
    assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["requests"])
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_it_runs_without_privileges() -> None:
    user = POD["securityContext"]["runAsUser"]
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert type(user) is int
    assert user > 0
    assert f"\nUSER {user}:{user}\n" in (ROOT / "Dockerfile").read_text()
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(POD)


def test_it_can_write_where_the_image_writes() -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert set(mounts.values()) == {"/tmp", "/tmp/cache", "/app/runs"}
    assert {volume["name"] for volume in POD["volumes"]} == set(mounts)
    assert "\nWORKDIR /app\n" in (ROOT / "Dockerfile").read_text()


def test_what_it_writes_fits_the_disk_that_it_asks_for() -> None:
    sizes = [size_bytes(volume["emptyDir"]["sizeLimit"]) for volume in POD["volumes"]]
    assert sum(sizes) < size_bytes(CONTAINER["resources"]["limits"]["ephemeral-storage"])


def test_it_has_an_identity_and_no_key() -> None:
    assert POD["serviceAccountName"] == of_kind("ServiceAccount")["metadata"]["name"]
    assert POD["automountServiceAccountToken"] is False
    assert secrets(DOCUMENTS) == []


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "HF_TOKEN", "value": "x"},
        {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"},
        {"name": "HARMLESS", "value": "AKIA" + "A" * 16},
        {"name": "HARMLESS", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
        {"secretRef": {"name": "a"}},
    ],
)
def test_a_secret_would_be_seen(entry: dict[str, Any]) -> None:
    documents = copy.deepcopy(DOCUMENTS)
    (job,) = [document for document in documents if document["kind"] == "Job"]
    job["spec"]["template"]["spec"]["containers"][0]["env"] = [entry]
    assert secrets(documents)


def supervised() -> tuple[list[str], list[str]]:
    """The flags of the supervisor, and torchrun's arguments behind the first `--`."""
    assert "command" not in CONTAINER, "args are the whole command: the image has no entrypoint"
    assert CONTAINER["args"][:3] == ["python", "-m", "launch.supervise"]
    place = CONTAINER["args"].index("--")
    return CONTAINER["args"][3:place], CONTAINER["args"][place + 1 :]


def test_the_training_program_takes_the_flags() -> None:
    torchrun = parse_args(supervised()[1])
    assert torchrun.training_script == "launch/train.py"
    config = parse_config(torchrun.training_script_args)
    assert config.run == "gs://YOUR-BUCKET/runs/gpt2-124m"
    assert config.preset == "gpt2-124m"
    assert config.data
    assert all("=gs://YOUR-BUCKET/" in source for source in config.data)


def supervisor_flags() -> Flags:
    """As the supervisor reads them."""
    flags: Flags = parse(Flags, supervised()[0], prog="x", description="x")
    return flags


def test_the_supervisor_ends_within_what_gke_gives_a_pod() -> None:
    gke_gives = 15
    assert supervisor_flags().grace_seconds < gke_gives <= POD["terminationGracePeriodSeconds"]


def test_probes_ask_the_supervisor_and_are_patient() -> None:
    (port,) = CONTAINER["ports"]
    assert port["containerPort"] == supervisor_flags().health_port
    paths = {"livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    for name, path in paths.items():
        assert CONTAINER[name]["httpGet"] == {"path": path, "port": port["name"]}
    alive = CONTAINER["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 60


def test_a_flag_that_does_not_exist_is_refused() -> None:
    arguments = parse_args([*supervised()[1], "--no_such_flag=1"]).training_script_args
    with pytest.raises(ConfigurationError, match="Unrecognized options: --no_such_flag=1"):
        parse_config(arguments)
