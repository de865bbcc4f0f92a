"""The job controller: takes jobs through their states, and nothing else of the service does."""
