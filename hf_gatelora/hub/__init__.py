"""Former places of `hf_gatelora.card.push` and `hf_gatelora.card.write`, kept until 1.0."""
