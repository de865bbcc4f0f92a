"""The customer's side of offsite tuning over HTTP: a bundle comes down, is tuned at home, the adapter goes back up.

It needs the base install only, and speaks to any service that has `/v1/offsite`."""

from ot_ray.client.client import Client, Offer
from ot_ray.client.source import OfferedBundle, service_of
from ot_ray.client.tuning import TunedAdapter, tune

__all__ = ["Client", "Offer", "OfferedBundle", "TunedAdapter", "service_of", "tune"]
