"""What a run will need on machines that are not at hand: `read-jax plan`."""
