"""Read raw records: txt, jsonl, json, csv, parquet and arrow, plain, compressed or in archives.

source_files: paths, globs, folders -> SourceFile -> stream
reader: stream -> SourceRecord
rows: folder -> files of a split (splits) -> shuffled windows of rows, from any position
archives, decompress: the streams below them
"""
