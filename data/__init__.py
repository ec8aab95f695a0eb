"""The stream: shards become ordered, decoded, tokenised batches, and a run that stopped goes on with the next one."""
