"""The worker behind `/v1/cola`: operations of many sessions, taken from the database and carried out on one base model.

What a client may ask is the routes' affair, whose turn it is the catalogue's, the mathematics ot_ray.cola's."""
