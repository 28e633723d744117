#!/bin/sh
# HAProxy as Ray starts it, without splicing. Ray's configuration has `option splice-request`: with
# it HAProxy 2.8 reads nothing more from a caller whose body came after the headers, and does not
# notice that he left before the answer began. See serve_app/environment.py.
exec "${ATLAS_HAPROXY_BINARY:-haproxy}" -dS "$@"
