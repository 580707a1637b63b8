"""The product on a virtual clock: the shipped routers, schedulers and planner with a cost model in place of tensors."""
