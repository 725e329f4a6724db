"""A small asynchronous client for etcd: `etcd3`'s messages on `grpc.aio`, with watches and leases of our own."""
