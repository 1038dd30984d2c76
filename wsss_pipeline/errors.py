"""Every error this package raises on purpose.

    WsssError
    +-- ConfigError              an option, a YAML file or a combination of them
    +-- ClassSetError            a class set that can't be read or contradicts itself
    +-- LabelError               a label file: unreadable, unknown class, unsafe image id
    +-- ImageError               one image or mask file that can't be used
    +-- MaskError                one image's mask: missing, damaged, or arrays that are no mask
    |   +-- CacheRecordError     its record in the cache is missing or damaged
    +-- RegionError              one image's regions: missing, damaged, of another size
    +-- OutputError              a file or folder can't be written: disk full, read-only, permission
    +-- WeightsError             CLIP weights or their tokenizer
    +-- MissingDependencyError   an optional package that the chosen option needs
    +-- ResourceError            the machine ran out of file handles, memory, ...: no file is to blame
    +-- EngineError              what spreads the work over machines
    +-- CacheError               the pseudo-mask cache
    |   +-- CacheFormatError     written by another format version, or not a cache
    |   +-- CacheLockedError     another process writes the same shard
    +-- NetworkError             a segmentation network or its initial weights
    +-- CheckpointError          a trained checkpoint: missing, damaged, or of another kind
    +-- TrainingError            training can't start or go on: data missing, NaN, changed settings
    +-- EvaluationError          ground truth and predictions that don't fit together

The message of each says what is wrong, where, and how to mend it, in one line: the command line
prints it as it stands and exits with code 2.
"""


class WsssError(Exception):
    """Base class: catch it to catch everything that this package raises on purpose."""


class ConfigError(WsssError):
    """An option, a configuration file, or a combination of them can't be used."""


class ClassSetError(WsssError):
    """A class set can't be read or contradicts itself."""


class LabelError(WsssError):
    """A label file can't be read, names an unknown class or holds an unsafe image id."""


class ImageError(WsssError):
    """One image or mask file can't be used; the run reports it, skips it and goes on."""


class MaskError(WsssError):
    """The mask of one image is missing, damaged, or no mask at all; the run reports it, skips it and goes on."""


class RegionError(WsssError):
    """The regions of one image are missing, damaged or of another size; the run reports it, skips it and goes on."""


class OutputError(WsssError):
    """A file or folder can't be written: disk full, read-only, no permission."""


class WeightsError(WsssError):
    """CLIP weights or their tokenizer can't be found or read."""


class ResourceError(WsssError):
    """The machine ran out of file handles, memory, ...; the run ends, for no image is to blame for that."""


class EngineError(WsssError):
    """What spreads the work over machines gave up."""


class MissingDependencyError(WsssError):
    """The chosen option needs an optional package that isn't installed."""


class CacheError(WsssError):
    """Base class of what can go wrong with the pseudo-mask cache."""


class CacheFormatError(CacheError):
    """The folder or file isn't a cache, or another format version wrote it."""


class CacheLockedError(CacheError):
    """Another process is writing the same shard."""


class CacheRecordError(CacheError, MaskError):
    """The record of one image in the cache is missing or damaged."""


class NetworkError(WsssError):
    """A segmentation network is unknown, or its initial weights can't be found or don't fit."""


class CheckpointError(WsssError):
    """A trained checkpoint is missing, damaged or of another kind."""


class TrainingError(WsssError):
    """Training can't start or go on: masks are missing, the loss isn't a number, settings have changed."""


class EvaluationError(WsssError):
    """Ground truth and predictions don't fit together."""
