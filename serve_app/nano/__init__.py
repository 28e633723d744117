"""The bundled offline pool: task generators, trainer, evaluation and weights of three nano models."""
