"""Runs in Synapse's image: query.py HOMESERVER_YAML QUERY prints the rows as CSV, by Synapse's own connection settings."""

import csv
import sys

import psycopg2
import yaml

with open(sys.argv[1], encoding="utf-8") as file:
    arguments = yaml.safe_load(file)["database"]["args"]
with psycopg2.connect(**{key: value for key, value in arguments.items() if not key.startswith("cp_")}) as connection:
    cursor = connection.cursor()
    cursor.execute(sys.argv[2])
    rows = csv.writer(sys.stdout)
    rows.writerow(column.name for column in cursor.description)
    rows.writerows(cursor)
