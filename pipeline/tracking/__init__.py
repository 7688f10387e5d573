"""The MLflow run of a job: exactly one, however often the job is restarted."""
