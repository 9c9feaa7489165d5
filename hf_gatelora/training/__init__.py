"""Training with gates: the controller, Trainer, engines, callbacks and loops."""
