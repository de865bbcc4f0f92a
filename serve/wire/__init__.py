"""What travels over HTTP, as types; one module a resource."""
