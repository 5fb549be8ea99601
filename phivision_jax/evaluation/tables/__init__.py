"""The forms in which benchmarks are published: files of rows, of which only the texts are kept in memory.

parquet_file   a split of a Hugging Face data set, images as structs of bytes and path
tsv_file       a file of VLMEvalKit, images in base64
json_file      annotations as JSON or JSON lines, images beside them
row            a row: its texts, checked as they are read, and its images, read when they are asked for
locate         the files of a folder that are read, and the download of a folder
benchmark      benchmarks whose items are rows
"""
