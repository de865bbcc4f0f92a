"""What the verbs do for image models: open a customer's images for tuning, and compare five settings by accuracy."""
