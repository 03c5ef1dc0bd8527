"""The zoo: the recipes that train the models which ship with probekit, and their weights."""
