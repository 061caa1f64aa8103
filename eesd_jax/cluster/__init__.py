"""Several processes of one run, and the machines that they are on."""
