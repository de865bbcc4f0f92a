"""What a service is configured with, one module a section; serve/config.py puts them together."""
