"""The one idea: shards are boxes, and every element has one owner. Arithmetic only; no communication."""
