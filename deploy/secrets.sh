#!/bin/sh
# Make the secrets of one installation in a new folder: passwords, accounts, URLs, a certificate.
#
#   sh secrets.sh [FOLDER]            default: secrets
#
# The addresses are those of compose.yaml; set POSTGRES, PRIMARY and SENTINELS for others. Replace
# certificate.pem, which signs itself, by a certificate that browsers trust.
set -eu

folder=${1:-secrets}
postgres=${POSTGRES:-postgres:5432}
primary=${PRIMARY:-valkey-1 6379}
sentinels=${SENTINELS:-sentinel-1:26379,sentinel-2:26379,sentinel-3:26379}

# Other accounts of the machine can't enter the folder. Containers mount single files of it, and
# read them as accounts of their own.
umask 022
mkdir -m 700 "$folder"
cd "$folder"

random() { openssl rand -hex 24; }
digest() { printf %s "$1" | openssl dgst -sha256 -r | cut -d ' ' -f 1; }

random > postgres_password
owner=$(random) service=$(random) broker=$(random) replica=$(random) sentinel=$(random) watch=$(random)
random > redis_password

openssl rand -base64 48 | tr -d '\n' > secret_key
echo "postgresql://broker_service:$service@$postgres/broker" > database_url
echo "postgresql://broker_owner:$owner@$postgres/broker" > owner_database_url
cat > roles.sql <<END
ALTER ROLE broker_owner PASSWORD '$owner';
ALTER ROLE broker_service PASSWORD '$service';
END

echo "redis+sentinel://broker:$broker@$sentinels/broker?sentinel_password=$watch" > redis_url
# Redis' documentation names the commands that Sentinels and replicas need.
cat > users.acl <<END
user default off
user broker on #$(digest "$broker") ~* resetchannels -@all +@all -@admin -@dangerous +info +config|get
user replica on #$(digest "$replica") resetchannels -@all +psync +replconf +ping
user operator on #$(digest "$(cat redis_password)") ~* allchannels +@all
user sentinel on #$(digest "$sentinel") allchannels -@all +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info +client|setname +client|kill +script|kill
END
cat > replication.conf <<END
masteruser replica
masterauth $replica
END
cat > monitor.conf <<END
sentinel monitor broker $primary 2
sentinel auth-user broker sentinel
sentinel auth-pass broker $sentinel
sentinel sentinel-pass $watch
requirepass $watch
END

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \
  -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 \
  -keyout key.pem -out certificate.pem 2> /dev/null
cat key.pem >> certificate.pem
rm key.pem
