#!/bin/sh
# HAProxy as Ray starts it, with its doors closed: haproxy.awk rewrites the configuration that Ray has
# just written, in place, because Ray knows its HAProxy processes by the file they are started with.
# A file that cannot be rewritten keeps HAProxy from starting; Ray logs why.
#
# -dS is without splicing. Ray's configuration has `option splice-request`: with it HAProxy 2.8 reads
# nothing more from a caller whose body came after the headers, and does not notice that he left before
# the answer began. See serve_app/environment.py.
set -eu
umask 077

configuration=
before=
for argument; do
    if [ "$before" = -f ]; then configuration=$argument; fi
    before=$argument
done

if [ -n "$configuration" ]; then
    awk -f "$(dirname "$0")/haproxy.awk" "$configuration" > "$configuration.closed"
    mv -f "$configuration.closed" "$configuration"
fi

exec "${ATLAS_HAPROXY_BINARY:-haproxy}" -dS "$@"
