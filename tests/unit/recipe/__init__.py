"""Each check must turn green on a sound run and red on the fault that it looks for."""
