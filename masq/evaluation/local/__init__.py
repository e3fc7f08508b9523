"""masq's own tasks as the harnesses know them: YAML files, offline, on data that come with the package."""
