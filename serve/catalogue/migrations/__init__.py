"""The steps that bring a database from one form of the tables to the next."""
