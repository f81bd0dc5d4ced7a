"""A small Hub in memory, over HTTP, that the real `huggingface_hub` client talks to.

accounts.py   users, tokens, who may read and write what, and the errors the Hub answers with
store.py      repositories: blobs, commits, branches, tags, pull requests
cards.py      README front matter: checks, tags, and what a model search sees
routing.py    one request, one answer, the table of routes
api.py        /api routes that search, describe and administer repositories
trees.py      /api routes over trees, paths and commits
refs.py       /api routes over branches, tags and pull requests
uploads.py    preupload, LFS and commit routes
spaces.py     a Space's variables, secrets, hardware, runtime and logs
downloads.py  resolve routes: ETags and ranges
faults.py     injected faults
server.py     HubServer: sockets, the request log, the surface tests use
"""
