"""The version of the package, in one place."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("gossamer")
except PackageNotFoundError:  # run from a source tree
    VERSION = "0+source"
