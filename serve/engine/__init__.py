"""Generation: requests in, text out, for a base model and the plug-in models around it.

HTTP, tenants and the database are unknown here."""
