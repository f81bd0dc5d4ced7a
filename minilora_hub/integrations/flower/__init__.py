"""A Flower app: clients train an adapter on rows that stay with them, and a server averages the adapters.

`client_app` and `server_app` are what the app's pyproject.toml names; docs/federated.md has one. They carry what
`training.federated` computes as Flower's messages. Everything here imports Flower, which the extra ``flower`` brings.
"""
