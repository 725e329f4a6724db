"""A small asynchronous client for etcd: `etcd3`'s messages on `grpc.aio`, watches and leases of our own."""
