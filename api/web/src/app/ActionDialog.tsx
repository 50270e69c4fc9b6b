// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// The dialog of one call to the API: its fields, what went wrong, and the button that makes it.
import { Button, Group, Modal, Stack } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import type { FormEvent, ReactNode } from 'react';

import { ApiError } from '../api/client';
import { refresh } from '../api/queries';
import { watchTask } from '../tasks/watch';
import { ErrorNote } from './ErrorPage';
import { useOpenTask } from './navigation';

interface ActionDialogProps {
  title: string;
  /** What the button says. */
  verb: string;
  /** The call. The task that it begins, if any, is followed, and its log opens. */
  act: () => Promise<string | null>;
  onClose: () => void;
  /** Whether the fields say all that is needed. */
  valid?: boolean;
  /** Something is lost by it. */
  isDangerous?: boolean;
  /** There is nothing to fill in, so the button has the focus. */
  isQuestion?: boolean;
  size?: 'sm' | 'md';
  /** What else failed, such as reading what can be chosen. */
  error?: unknown;
  /** The fields, told what the API says of each parameter. */
  children: (errors: Record<string, string>) => ReactNode;
}

export function ActionDialog({ title, verb, act, onClose, valid = true, isDangerous = false, isQuestion = false, size = 'sm', error, children }: ActionDialogProps) {
  const openTask = useOpenTask();
  const action = useMutation({
    mutationFn: act,
    onSuccess: (upid) => {
      onClose();
      if (!upid) return;
      void watchTask(upid);
      openTask(upid);
    },
    onSettled: refresh,
  });
  const submit = (event: FormEvent) => {
    event.preventDefault();
    if (valid) action.mutate();
  };
  return (
    <Modal opened onClose={onClose} title={title} size={size}>
      <form onSubmit={submit}>
        <Stack gap="sm">
          {children(action.error instanceof ApiError ? action.error.errors : {})}
          <ErrorNote error={action.error ?? error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" data-autofocus={isQuestion || undefined} {...(isDangerous ? { color: 'red' } : {})} disabled={!valid} loading={action.isPending}>
              {verb}
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
