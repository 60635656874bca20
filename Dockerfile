# The training program in a container that needs no root, no home and no writable system.
#
# For GPUs:    docker build -t rangeflow .
# For CPUs:    docker build -t rangeflow:cpu \
#                --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# On a base that has torch (name the torch that it has, or it is replaced):
#              docker build --build-arg BASE=pytorch/pytorch:TAG --build-arg TORCH=torch==X.Y.Z .
# Try it:      docker run --rm --gpus all -v rangeflow-runs:/app/runs rangeflow
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Layers from the slowest and rarest change to the quickest: system, torch, dependencies, code.
# g++ is what torch.compile calls.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# A base may mark its Python as managed by the system; inside the image it is ours.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore

# The index decides CPU or CUDA (and which CUDA): the version stays the same.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --index-url "${TORCH_INDEX}" "${TORCH}"

# The dependencies alone, so that a change of code reinstalls nothing. Naming torch again keeps it.
WORKDIR /app
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['health'], sep='\n')" > requirements.txt \
 && pip install "${TORCH}" --requirement requirements.txt

# A numeric user, so that Kubernetes can check runAsNonRoot. runs/ is for a volume: runs, and the
# curves of remote runs. Anybody may write there, for `docker run --user` with another number.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp rangeflow \
 && install --directory --mode=1777 runs

# Everything that is written, besides runs/, is below /tmp. USER is what torch's compiler names
# its cache by when the number has no name. GKE puts the driver's libraries below
# /usr/local/nvidia, where only images that say so look.
ENV HOME=/tmp \
    USER=rangeflow \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    TIKTOKEN_CACHE_DIR=/tmp/cache/tiktoken \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1

COPY storage/ storage/
COPY data_service/ data_service/
COPY checkpointing/ checkpointing/
COPY trainer/ trainer/
COPY launch/ launch/

ARG REVISION=unknown
LABEL org.opencontainers.image.title="RangeFlow" \
      org.opencontainers.image.description="Trains GPT-style language models on GPUs that can be taken away at any moment, bit for bit." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"

USER 10001:10001
# The supervisor is process 1: it hears the SIGTERM, reaps, and ends with a code that says why.
# The first `--` ends its own flags; the second stands before the script, or torchrun on Python 3.11
# takes `--run` for its own.
CMD ["python", "-m", "launch.supervise", "--", "--standalone", "--nproc_per_node=1", "--", "launch/train.py", "--run", "runs/default"]
