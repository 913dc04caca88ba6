"""Sites: who holds which data, how one learns, and how packets travel between them."""

from gose.sites.network import Exchange, exchange
from gose.sites.site import Site, divide, learn, local_fisher

__all__ = ["Exchange", "Site", "divide", "exchange", "learn", "local_fisher"]
