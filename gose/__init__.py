"""Graph of specialized experts: recycle retired models, route by entropy, merge across sites."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("gose")
except PackageNotFoundError:  # a checkout on sys.path that nobody installed
    __version__ = "0+uninstalled"
