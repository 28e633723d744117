"""The bundled offline pool: generators, trainer, evaluation and weights of three nano models."""
