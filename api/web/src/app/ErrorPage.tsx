// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// What is shown where a page cannot be.
import { Alert, Anchor, Code, Stack, Title } from '@mantine/core';
import { Link, type ErrorComponentProps } from '@tanstack/react-router';

import { errorText } from '../api/client';

export function ErrorPage({ error }: ErrorComponentProps) {
  return (
    <Stack p="xl" maw={700}>
      <Title order={1}>This page failed</Title>
      <Code block>{errorText(error)}</Code>
      <Anchor href="/">Load the page anew</Anchor>
    </Stack>
  );
}

export function NotFoundPage() {
  return (
    <Stack p="xl" maw={700}>
      <Title order={1}>There is no such page</Title>
      <Anchor component={Link} to="/">
        To the datacenter
      </Anchor>
    </Stack>
  );
}

/** An error of a part of the page, in words. */
export function ErrorNote({ error, title }: { error: unknown; title?: string }) {
  if (!error) return null;
  return (
    <Alert color="red" variant="light" role="alert" {...(title ? { title } : {})} style={{ whiteSpace: 'pre-line' }}>
      {errorText(error)}
    </Alert>
  );
}
