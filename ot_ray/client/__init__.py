"""The customer's side of a service over HTTP. Offsite tuning: a bundle comes down, is tuned at home, the adapter goes
back up. Gradient learning: the service runs the base model, the fit is made at home.

It needs the base install only, and speaks to any service that has `/v1/offsite` or `/v1/cola`."""

from ot_ray.client.client import Client, Offer
from ot_ray.client.cola import ColaClient
from ot_ray.client.cola_session import ColaFuture, ColaSession
from ot_ray.client.cola_trainer import ColaTrainer, Trained
from ot_ray.client.source import OfferedBundle, service_of
from ot_ray.client.tuning import TunedAdapter, tune

__all__ = [
    "Client",
    "ColaClient",
    "ColaFuture",
    "ColaSession",
    "ColaTrainer",
    "Offer",
    "OfferedBundle",
    "Trained",
    "TunedAdapter",
    "service_of",
    "tune",
]
