"""Python imports this at its start, where the folder is on PYTHONPATH: then every process computes as another machine."""

import perturbed_products  # noqa: F401
