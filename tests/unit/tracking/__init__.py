"""The MLflow run of a job, in a sqlite file of its own."""
