// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The sign-in form.
import { Alert, Box, Button, Center, Paper, PasswordInput, Select, Stack, Text, TextInput, Title } from '@mantine/core';
import { useNavigate, useSearch } from '@tanstack/react-router';
import { useEffect, useState, type FormEvent } from 'react';

import { call, errorText } from '../api/client';
import { useRealms } from '../api/queries';
import { session, type TicketAnswer } from '../api/session';
import type { Realm } from '../api/types';
import { Logo } from '../ui/Logo';

const REALM_KEY = 'atoll.realm';
const BUILT_IN: Realm[] = [{ realm: 'pam', type: 'pam', comment: 'Linux users of the node' }];

function useSignIn() {
  const navigate = useNavigate();
  const next = (useSearch({ strict: false }) as { next?: string }).next ?? '/';
  const [error, setError] = useState<string | null>(session.endReason);
  const [busy, setBusy] = useState(false);
  const signIn = async (username: string, password: string) => {
    setBusy(true);
    setError(null);
    try {
      const answer = await call<TicketAnswer>('POST', '/access/ticket', { username, password });
      if (answer.NeedTFA) throw new Error('This user needs a second factor, which this page cannot ask for yet. Use an API token.');
      session.begin(answer);
      void navigate({ href: next, replace: true });
    } catch (failure) {
      setError(errorText(failure));
      setBusy(false);
    }
  };
  return { error, busy, signIn };
}

export function SignIn() {
  const realms = useRealms();
  const { error, busy, signIn } = useSignIn();
  const [user, setUser] = useState('');
  const [password, setPassword] = useState('');
  const [realm, setRealm] = useState(localStorage.getItem(REALM_KEY) ?? '');
  const rows = realms.data?.length ? realms.data : BUILT_IN;
  const chosen = rows.find((row) => row.realm === realm) ?? rows.find((row) => row.default) ?? rows[0];

  useEffect(() => {
    document.title = 'Sign in – Atoll';
  }, []);
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (chosen) localStorage.setItem(REALM_KEY, chosen.realm);
    // A user typed with its realm wins over the choice below it.
    void signIn(user.includes('@') ? user : `${user}@${chosen?.realm ?? 'pam'}`, password);
  };

  return (
    <Center component="main" mih="100vh" bg="var(--atoll-surface)">
      <Paper withBorder p="xl" w={380} shadow="sm">
        <form onSubmit={submit}>
          <Stack gap="sm">
            <Box mb="xs">
              <Logo size={36} />
              <Title order={1} mt="xs">
                Sign in to Atoll
              </Title>
              <Text size="sm" c="dimmed">
                {location.host}
              </Text>
            </Box>
            {error && (
              <Alert color="red" variant="light" role="alert">
                {error}
              </Alert>
            )}
            <TextInput label="User" name="username" autoComplete="username" autoFocus required value={user} onChange={(event) => setUser(event.currentTarget.value)} />
            <PasswordInput label="Password" name="password" autoComplete="current-password" required value={password} onChange={(event) => setPassword(event.currentTarget.value)} visibilityToggleButtonProps={{ 'aria-label': 'Show the password' }} />
            <Select
              label="Realm"
              allowDeselect={false}
              data={rows.map((row) => ({ value: row.realm, label: row.comment ? `${row.realm} – ${row.comment}` : row.realm }))}
              value={chosen?.realm ?? null}
              onChange={(value) => value && setRealm(value)}
              disabled={user.includes('@')}
            />
            <Button type="submit" size="sm" mt="xs" loading={busy}>
              Sign in
            </Button>
          </Stack>
        </form>
      </Paper>
    </Center>
  );
}
