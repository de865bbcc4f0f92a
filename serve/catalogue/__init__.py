"""The service's database: the only room that knows SQL.

`Catalogue` has a member for each table; records are what its methods return."""

from serve.catalogue.catalogue import Catalogue
from serve.catalogue.config import DatabaseConfig
from serve.catalogue.records import SCOPES, Page, TenantLimits, new_id

__all__ = ["SCOPES", "Catalogue", "DatabaseConfig", "Page", "TenantLimits", "new_id"]
