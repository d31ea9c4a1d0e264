"""MLflow: the run of an output, the server, its models and registry."""
