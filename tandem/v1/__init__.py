"""Generated protobuf and gRPC code of `proto/tandem/v1`. Regenerate with `make proto`."""
