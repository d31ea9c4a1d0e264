"""MLflow's server, its models and registry."""
