// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
// Has the node pull an OCI image from a registry into a storage, where it is a container template.
import { Button, Group, Modal, Stack, TextInput } from '@mantine/core';
import { useMutation } from '@tanstack/react-query';
import { useState, type FormEvent } from 'react';

import { ApiError, call, path } from '../api/client';
import { refresh } from '../api/queries';
import { ErrorNote } from '../app/ErrorPage';
import { useOpenTask } from '../app/navigation';

interface PullProps {
  node: string;
  storage: string;
  onClose: () => void;
}

export function PullDialog({ node, storage, onClose }: PullProps) {
  const [reference, setReference] = useState('');
  const [filename, setFilename] = useState('');
  const openTask = useOpenTask();
  const start = useMutation({
    mutationFn: () => call<string>('POST', path`/nodes/${node}/storage/${storage}/oci-registry-pull`, { reference, ...(filename ? { filename } : {}) }),
    onSuccess: (upid) => {
      onClose();
      openTask(upid);
    },
    onSettled: refresh,
  });
  const errors = start.error instanceof ApiError ? start.error.errors : {};
  const submit = (event: FormEvent) => {
    event.preventDefault();
    start.mutate();
  };
  return (
    <Modal opened onClose={onClose} title={`Pull an image to ${storage}`}>
      <form onSubmit={submit}>
        <Stack gap="sm">
          <TextInput
            label="Reference"
            description="registry/repository:tag, or @sha256:… for a digest; without a registry it is Docker's"
            required
            data-autofocus
            value={reference}
            error={errors['reference']}
            onChange={(event) => setReference(event.currentTarget.value)}
          />
          <TextInput label="File name" description="Ends in .tar; the image's own when empty" value={filename} error={errors['filename']} onChange={(event) => setFilename(event.currentTarget.value)} />
          <ErrorNote error={start.error} />
          <Group justify="flex-end" gap="xs">
            <Button variant="default" onClick={onClose}>
              Cancel
            </Button>
            <Button type="submit" loading={start.isPending} disabled={!reference}>
              Pull
            </Button>
          </Group>
        </Stack>
      </form>
    </Modal>
  );
}
