"""Read raw records: text, jsonl, json, csv, parquet and arrow, plain, compressed or in archives."""
