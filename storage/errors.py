"""The errors that a user, a file or a network can cause, and what each means for a restart.

RangeFlowError                 an error with a message for people; never shown with a traceback
|-- ConfigurationError         what was asked for cannot be done; no restart helps  (exit 78)
|   |-- DataError              a source is missing, damaged or of the wrong kind
|   |-- UnlikeHostsError       the processes of a world cannot train together
|   `-- NoUsableCheckpointError  every checkpoint of the run is damaged
|-- IntegrityError             bytes are not what their digest says                 (exit 78)
|-- StoreUnavailableError      a store, disk or network failed; a restart may help  (exit 75)
|   `-- StoreRefusedError        the store does not permit the operation
|-- DivergenceError            the processes do not hold the same state            (exit 75)
|-- RunBusyError               another incarnation is alive on the run              (exit 75)
|-- StopRequestedError         a notice came before training began                  (exit 75)
`-- FencedError                a later incarnation has claimed the run              (exit 76)
"""


class RangeFlowError(Exception):
    """An error whose message is written for the person who runs the program."""

    exit_code = 70


class ConfigurationError(RangeFlowError):
    """What was asked for cannot be done; starting again without a change will not help."""

    exit_code = 78


class DataError(ConfigurationError):
    """A source of tokens is missing, damaged, or not what the run expects."""


class UnlikeHostsError(ConfigurationError):
    """The processes of a world cannot train together: one of them was started with other things."""


class NoUsableCheckpointError(ConfigurationError):
    """The run has checkpoints, and none of them can be restored."""


class IntegrityError(RangeFlowError):
    """Bytes read are not the bytes that were written."""

    exit_code = 78


class StoreUnavailableError(RangeFlowError):
    """A store did not do what was asked, for a reason that may pass (network, disk, quota)."""

    exit_code = 75


class StoreRefusedError(StoreUnavailableError):
    """A store did not permit what was asked. In the middle of a run, the permission may return."""


class DivergenceError(RangeFlowError):
    """The processes of a run do not hold the same state; a restart goes back to where they did."""

    exit_code = 75


class RunBusyError(RangeFlowError):
    """Another incarnation is alive on this run."""

    exit_code = 75


class StopRequestedError(RangeFlowError):
    """A notice came before training began: there is nothing to save, and a restart goes on."""

    exit_code = 75


class FencedError(RangeFlowError):
    """A later incarnation has claimed this run: this one must stop and change nothing."""

    exit_code = 76
