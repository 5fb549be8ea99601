# Image for training in containers (docs/launch.md): docker build --build-arg EXTRA=cuda -t IMAGE .
FROM python:3.12-slim

# tpu, cuda (CUDA 12) or cuda13
ARG EXTRA=tpu
# Logs appear at once where output is no terminal.
ENV PYTHONUNBUFFERED=1

# The source stays in the image: commands name files of configs/ relative to this directory.
WORKDIR /phivision_jax
COPY . .
RUN pip install --no-cache-dir --constraint requirements.lock --editable ".[$EXTRA]"
