"""The contestants by name."""

from collections.abc import Callable

from benchmarks.data_contestants import Contestant, NanoGpt, Ours
from benchmarks.data_peers import Grain, GrainMemmap, LitData, Streaming
from benchmarks.data_torchdata import Datasets, DatasetsMapStyle, TorchData, TorchDataNodes

OURS = "rangeflow"
NANOGPT = "nanoGPT memmap"

MAKERS: dict[str, Callable[[], Contestant]] = {
    OURS: Ours,
    "streaming": Streaming,
    "litdata": LitData,
    "torchdata": TorchData,
    "torchdata.nodes": TorchDataNodes,
    "datasets": Datasets,
    "datasets, map-style": DatasetsMapStyle,
    "grain": Grain,
    "grain, memmap": GrainMemmap,
    NANOGPT: NanoGpt,
}
