"""gRPC servicers, converters, the error table, and the descriptor socket."""
