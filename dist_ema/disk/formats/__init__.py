"""The bytes within files: safetensors, checksums. Local files only."""
