"""The bytes within files: safetensors, checksums, configuration files. Local files only."""
