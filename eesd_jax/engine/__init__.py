"""Text in, text out: tokens, buckets and programs behind `eesd_jax.load`."""
